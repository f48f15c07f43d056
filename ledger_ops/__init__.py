"""The read side and the housekeeping of a ledger, for the command line, the page and MCP.

    from ledger_ops import Filter, Reader, open_store
    reader = Reader(open_store("ledger.db"))
    for record in reader.calls(Filter(tool="charge", status="failed"), limit=20).records: ...

`reader` looks, `acts` settle what a person decides, `transfer`, `upkeep` and `doctor` keep the file.
"""
