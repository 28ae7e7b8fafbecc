<?php
// Takes a body of any length to the disk and forgets it.
$target = tmpfile();
stream_copy_to_stream(fopen('php://input', 'rb'), $target);
http_response_code(204);
