"""The reference's released networks: variable names, files, architecture."""
