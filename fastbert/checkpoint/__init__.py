"""What is on disk: folders, files, configurations, and what each family calls its weights."""
