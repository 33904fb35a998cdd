"""In a checkout, kernels/ and configs/ are next to this folder; an installed package has them inside it."""

import pathlib

if not (pathlib.Path(__file__).parent / "configs").is_dir():
    __path__.append(str(pathlib.Path(__file__).resolve().parents[1]))
