"""Numbers and types for people."""


def dtype_name(dtype: object) -> str:
    """bfloat16, of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def size(count: float) -> str:
    """Bytes, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what three digits round to 1000 goes on
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float | None) -> str:
    """A perplexity, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}" if value < 10_000 else f"{value:.2e}"
