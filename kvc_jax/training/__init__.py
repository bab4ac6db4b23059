"""Training of the small model that retrieves; needs the extra `train`. Nothing else of the package imports it."""
