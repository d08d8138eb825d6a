"""Models: loading, the policy module over forests, methods, packed attention, fast paths, the plan. Import from the modules by name."""

import logging

# On a processor with bf16 it warns, as soon as PEFT imports it, of a kernel for four bits that is not there and that no pass of ours takes.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# It writes to the standard output, where JSON may be asked for, and is imported by transformers wherever it is installed.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
