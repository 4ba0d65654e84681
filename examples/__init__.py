"""MAT on models and data of other people; every example is one command, see README.md."""
