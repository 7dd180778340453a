"""GGUF to a folder that transformers' from_pretrained loads. Imported only when a GGUF is converted."""
