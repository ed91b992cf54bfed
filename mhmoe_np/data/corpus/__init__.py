"""The embedded corpus: three public-domain texts of one domain each; see README.md."""
