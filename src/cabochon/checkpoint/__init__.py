"""What is on disk: headers first, bytes on request. Nothing here imports torch before a read."""
