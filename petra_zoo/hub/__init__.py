"""Publishing: model cards, export and the Hugging Face Hub."""
