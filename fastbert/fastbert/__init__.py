"""An empty package, which is there for the case that another project has overwritten `fastbert/__init__.py`.

The distribution `fastbert` on PyPI is another project. Its `fastbert/__init__.py` imports `fastbert.fastbert`, and
Python takes this package before its file `fastbert.py`. The check below then says what has happened.
"""

if __name__ == "fastbert":
    raise ImportError(
        f"`import fastbert` found {__file__}, a folder inside the package: run Python from another folder"
    )
else:
    from fastbert_kernels.distribution import check_imported

    check_imported()
