"""The Gemma 4 models and how pictures become their input."""
