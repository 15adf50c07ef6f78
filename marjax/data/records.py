"""The number of records in an ArrayRecord file, and advice for files that cannot be read."""


def num_records(path: str) -> int | None:
    """Number of records of a file; None if it is damaged. Raises OSError: too many files are open."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
        try:
            return int(reader.num_records())
        finally:
            reader.close()
    except Exception as error:
        if reached_limit(error):
            raise OSError(f"{path}: too many open files") from None
        return None


def reached_limit(error: Exception) -> bool:
    """Whether the process has too many open files."""
    return "too many open files" in str(error).lower()


def remedy(error: Exception, damaged: str) -> str:
    """Advice for an error while reading a file: `damaged`, unless too many files are open."""
    return "raise the limit of open files (ulimit -n)" if reached_limit(error) else damaged
