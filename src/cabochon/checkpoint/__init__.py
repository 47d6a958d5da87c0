"""What is on disk: headers first, bytes on request."""
