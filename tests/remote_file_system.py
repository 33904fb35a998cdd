"""A file system in memory for tests, under the protocol `failing`, whose writes can be made to end or to fail."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem


class FailingFileSystem(MemoryFileSystem):
    """After `limit` changes the next ones fail, and leave half of what they were to write if `torn`."""

    store: dict = {}
    pseudo_dirs = [""]
    protocol = "failing"
    limit: int | None = None
    torn = False
    error: type[Exception] = PermissionError
    failures: int | None = None  # how many fail; None: all from then on

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("failing://"))

    @classmethod
    def reset(cls, limit=None, torn=False, error=PermissionError, failures=None):
        cls.limit, cls.torn, cls.error, cls.failures = limit, torn, error, failures

    @classmethod
    def clear(cls):
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.reset()

    def _count(self, path, content=b""):
        cls = type(self)
        if cls.limit is None:
            return
        cls.limit -= 1
        if cls.limit < 0 and cls.failures != 0:
            if cls.failures is not None:
                cls.failures -= 1
            if cls.torn and content:
                super().pipe_file(path, content[: len(content) // 2])
            raise cls.error("the file system failed")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._count(path, value)
        super().pipe_file(path, value, mode, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def rm_file(self, path):
        self._count(path)
        super().rm_file(path)


class WalkedFileSystem(FailingFileSystem):
    """The same files under the protocol `walked`, found by fsspec's walk over `ls`, which fails for some folders."""

    protocol = "walked"
    find = AbstractFileSystem.find
    unlisted: str = ""  # how the folders that cannot be listed end
    listing_failures = 0  # how often

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("walked://"))

    def ls(self, path, detail=True, **kwargs):
        cls = type(self)
        if cls.listing_failures and cls.unlisted and path.rstrip("/").endswith(cls.unlisted):
            cls.listing_failures -= 1
            raise cls.error("the listing failed")
        return super().ls(path, detail, **kwargs)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
fsspec.register_implementation("walked", WalkedFileSystem, clobber=True)
