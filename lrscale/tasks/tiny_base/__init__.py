"""The tiny base model that ships with the package, and the script that makes it: `python -m lrscale.tasks.tiny_base`."""
