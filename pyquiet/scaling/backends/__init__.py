"""Where drafts and targets run: in this process, or on servers."""
