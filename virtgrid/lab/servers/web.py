"""nginx and Apache on a server host: their configuration, written below the host's directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from virtgrid.lab.servers.host import Server, certificate

#: Bytes of a file by name; ``large`` is above the tracker's threshold of 4 MiB.
PAGES: Final = {"small": 1000, "page": 40_000, "photo": 300_000, "medium": 2 << 20, "large": 8 << 20}
NGINX_PORT: Final = 80
NGINX_TLS_PORT: Final = 443
APACHE_PORT: Final = 8080
#: Where whatever nginx and Apache hand on to listens.
BACKEND_PORT: Final = 8000
#: Uploads to /limited/ may be no larger.
UPLOAD_MAX_BYTES: Final = 100_000

_USER: Final = "www-data"

_NGINX: Final = """
daemon off; worker_processes 1; pid {dir}/pid; error_log {dir}/error.log; user www-data;
events {{ worker_connections 512; }}
http {{
  access_log off; default_type text/plain; keepalive_timeout 600; keepalive_requests 10000;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s; client_max_body_size 64m;
  gzip_types text/plain; gzip_min_length 1000; gzip_comp_level 1; gzip_http_version 1.0;
  map $http_upgrade $connection_word {{ default upgrade; "" ""; }}
  ssl_certificate {pem}; ssl_certificate_key {key};
  server {{
    listen {port}; listen [::]:{port}; listen {tls_port} ssl; listen [::]:{tls_port} ssl;
    root {www};
    location /zipped/ {{ gzip on; alias {www}/; }}
    location = /nothing {{ return 204; }}
    location /limited/ {{ client_max_body_size {limit}; proxy_pass http://127.0.0.1:{backend}/; }}
    location /put/ {{ alias {upload}/; dav_methods PUT DELETE; }}
    location /app/ {{
      proxy_pass http://127.0.0.1:{backend}/; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_word;
    }}
  }}
}}
"""

_APACHE: Final = """
ServerRoot {dir}
ServerName guest.test
PidFile {dir}/apache.pid
DefaultRuntimeDir {dir}
ErrorLog {dir}/error.log
User www-data
Group www-data
Listen {port}
{modules}
StartServers 1
ServerLimit 2
ThreadsPerChild 16
MaxRequestWorkers 32
KeepAlive On
KeepAliveTimeout 600
MaxKeepAliveRequests 0
DocumentRoot {www}
DavLockDB {dir}/davlock
<Directory {www}>
  Require all granted
</Directory>
Alias /put {upload}
<Directory {upload}>
  Require all granted
  Dav On
</Directory>
Alias /limited {upload}
<Location /limited>
  LimitRequestBody {limit}
</Location>
ProxyPass /app/ http://127.0.0.1:{backend}/ flushpackets=on
ProxyRequests On
AllowCONNECT {backend}
<Proxy *>
  Require all granted
</Proxy>
"""
_APACHE_MODULES: Final = (
    "mpm_event", "authn_core", "authz_core", "alias", "dir", "mime", "dav", "dav_fs", "proxy", "proxy_http",
    "proxy_connect",
)  # fmt: skip


def pages(directory: Path) -> dict[Path, bytes]:
    """The files both serve. Not compressible: zipped they stay as long."""
    return {directory / "www" / name: os.urandom(size) for name, size in PAGES.items()}


def nginx(directory: Path) -> Server:
    """nginx on 80 and, with TLS, on 443, of both address families."""
    own = directory / "nginx"
    own.mkdir()
    pem, key = certificate(own)
    configuration = _NGINX.format(
        dir=own, www=directory / "www", upload=directory / "upload", pem=pem, key=key, port=NGINX_PORT,
        tls_port=NGINX_TLS_PORT, backend=BACKEND_PORT, limit=UPLOAD_MAX_BYTES,
    )  # fmt: skip
    return Server(
        name="nginx",
        argv=("nginx", "-p", str(own), "-c", str(own / "nginx.conf")),
        ports=(NGINX_PORT, NGINX_TLS_PORT),
        files={own / "nginx.conf": configuration, **pages(directory)},
        directories={own: _USER, directory / "upload": _USER, directory / "www": None},
        log=own / "error.log",
    )


def apache(directory: Path) -> Server:
    """Apache on 8080 of both address families; it serves the files that ``nginx`` writes."""
    own = directory / "apache"
    modules = "\n".join(
        f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in _APACHE_MODULES
    )
    configuration = _APACHE.format(
        dir=own, www=directory / "www", upload=directory / "upload", port=APACHE_PORT, modules=modules,
        backend=BACKEND_PORT, limit=UPLOAD_MAX_BYTES,
    )  # fmt: skip
    return Server(
        name="apache",
        argv=("apache2", "-X", "-f", str(own / "apache.conf")),
        ports=(APACHE_PORT,),
        files={own / "apache.conf": configuration, own / "mime.types": "text/plain txt\n"},
        directories={own: _USER, directory / "upload": _USER},
        log=own / "error.log",
    )
