"""Numbers only: tensors in, tensors out.  No files, no models, no recipes."""
