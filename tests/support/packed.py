"""Archives for tests."""

import gzip
import io
import tarfile


def tar_gz(files, extra=()):
    """A .tar.gz of files (name -> content) and of further bare members: the same bytes whenever it is made."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return gzip.compress(packed.getvalue(), mtime=0)
