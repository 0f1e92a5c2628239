"""`python -m extractor` is `dflash-cache`."""

from extractor.cli import main

if __name__ == "__main__":
    main()
