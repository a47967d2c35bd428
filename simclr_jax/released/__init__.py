"""The reference's released networks: names, files, architecture."""
