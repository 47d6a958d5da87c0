"""What a stored matrix is: slots, schemes, claims, and the verdict over them."""
