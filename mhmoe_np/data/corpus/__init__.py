"""The embedded corpus: three domains of public-domain text."""
