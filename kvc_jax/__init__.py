"""Paged KV-cache compression with a different rate for every attention head."""
