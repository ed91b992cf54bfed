"""From text to batches: documents, their split, the tokenizer, the token store, the windows."""
