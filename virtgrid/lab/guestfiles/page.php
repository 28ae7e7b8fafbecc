<?php
// A support page as a back end would make it: some milliseconds of waiting, then the text.
$file = '/var/www/pages/' . (int) $_GET['number'] . '.html';
if (!is_file($file)) {
    http_response_code(404);
    exit;
}
usleep(random_int(5000, 40000));
header('Content-Type: text/html');
header('Content-Length: ' . filesize($file));
readfile($file);
