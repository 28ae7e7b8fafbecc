"""What a journal says, shown: live view, plain lines, HTML and PNG."""
