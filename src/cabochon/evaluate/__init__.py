"""Accuracy as people publish it, with what they leave out: intervals and paired differences."""
