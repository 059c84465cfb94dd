"""`python -m skipdit.data`, the command of version 0.1."""

from skipdit.data.check import main

if __name__ == "__main__":
    main()
