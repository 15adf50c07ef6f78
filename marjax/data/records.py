"""Files that cannot be read: what is to be done about them, and how many records are in those of ArrayRecord."""


def num_records(path: str) -> int | None:
    """How many records a file has; None if it is damaged. Raises OSError: too many files are open to say."""
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
    """Whether it is not the file's fault: this process may not open more."""
    return "too many open files" in str(error).lower()


def remedy(error: Exception, damaged: str) -> str:
    """What to do about an error while reading a file: `damaged`, unless the file may be sound."""
    return "raise the limit of open files (ulimit -n)" if reached_limit(error) else damaged
