"""``python -m niwaki`` is ``niwaki``."""

from niwaki.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
