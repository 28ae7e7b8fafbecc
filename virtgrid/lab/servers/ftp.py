"""vsftpd on a server host: anonymous, active and passive, both address families, AUTH TLS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from virtgrid.lab.servers.host import Server, certificate

FTP_PORT: Final = 21
#: Bytes of a file by name; ``large`` is above the tracker's threshold of 4 MiB.
FILES: Final = {"small": 2000, "photo": 300_000, "medium": 2 << 20, "large": 8 << 20}
#: Uploads go to this directory.
INCOMING: Final = "incoming"

# The sandbox and the isolation make namespaces of their own, which leave the guest's.
_VSFTPD: Final = """
listen=NO
listen_ipv6=YES
background=NO
seccomp_sandbox=NO
isolate=NO
isolate_network=NO
secure_chroot_dir={empty}
anonymous_enable=YES
no_anon_password=YES
anon_root={root}
anon_world_readable_only=NO
anon_upload_enable=YES
anon_other_write_enable=YES
write_enable=YES
port_enable=YES
connect_from_port_20=YES
pasv_min_port=30000
pasv_max_port=30999
idle_session_timeout=600
ssl_enable=YES
allow_anon_ssl=YES
force_anon_logins_ssl=NO
force_anon_data_ssl=NO
require_ssl_reuse=NO
ssl_ciphers=HIGH
rsa_cert_file={pem}
rsa_private_key_file={key}
vsftpd_log_file={log}
xferlog_enable=YES
"""


def vsftpd(directory: Path) -> Server:
    """vsftpd on port 21 of both address families."""
    own = directory / "vsftpd"
    own.mkdir()
    root, log = own / "root", own / "vsftpd.log"
    pem, key = certificate(own)
    configuration = _VSFTPD.format(empty=own / "empty", root=root, pem=pem, key=key, log=log)
    return Server(
        name="vsftpd",
        argv=("vsftpd", str(own / "vsftpd.conf")),
        ports=(FTP_PORT,),
        files={
            own / "vsftpd.conf": configuration.lstrip(),
            **{root / name: os.urandom(size) for name, size in FILES.items()},
        },
        directories={own / "empty": None, root: None, root / INCOMING: "ftp"},
        log=log,
    )
