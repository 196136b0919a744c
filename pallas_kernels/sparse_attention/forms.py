"""Which form of attention a TPU runs, from the static shape of the call alone.

    masked      a kernel over tiles of entries, the selection as a mask (kernel.py)
    sparse      kernels that read the selected entries only (sparse.py)
    blockwise   plain XLA: a gather by entry numbers, or all entries where they are few (blockwise.py)

The figures are cycles of one device by the compiler's schedule (`python -m launch.bench kernels`), Pro, bfloat16.
"""

from __future__ import annotations

# A block of the masked kernel holds 8 queries of one row of the batch (v6e: 4,096 / heads). Where the row has fewer, as in
# decoding, the rest is multiplied for nothing, and every entry is read where a query selects one of sixteen. Plain XLA costs
# per query. Million cycles for 32 rows of one query, with the 127 keys of earlier tokens that the model passes:
#
#                                            v5p            v6e            TPU7x
#     16,384 entries, 1,024 selected, masked 4.99           11.4           2.94
#         1 / 8 queries, blockwise           0.78 / 4.27    1.03 / -       0.98 / 2.96
#     512 entries, all of them,       masked 0.28           0.83           0.24
#         1 / 8 queries, blockwise           0.08 / 0.36    0.07 / -       0.08 / 2.09
#
# v6e's limits are from before those keys were passed (4 queries 2.8; of all entries 8 queries 0.26).
# On TPU7x XLA hands the gather of several queries to the SparseCore, whose time the schedule does not show.
FEW_QUERIES = {"v5p": 9, "v6e": 16, "tpu7x": 8}  # from here on the masked kernel, where a query selects
FEW_QUERIES_OF_ALL = {"v5p": 6, "v6e": 16, "tpu7x": 4}  # where it reads every entry

# Up to 64K tokens the masked kernel, whose schedule is known to the last cycle. By that schedule the sparse form is cheaper
# beyond 1,700 / 5,300 / 3,600 visible entries (v5p / v6e / TPU7x) forward; at 64K tokens, forward and backward, about 4.5,
# 1.5 (Flash) and 2.5 times. But most of its rows are gathered by the SparseCore, whose time is not in any schedule here,
# and it takes ten times the memory. Where a selection is an eighth or more of the entries, the masked form stays until its
# backward pass does not fit VMEM, in bfloat16 beyond 86K tokens on v5p, 194K on v6e and 92K on TPU7x; the sparse form takes
# over a little before. In float32, whose tiles spill more, that is soon: beyond 43K, 97K and 44K tokens.
MOST_MASKED = 16384
# Entries of width 512 whose gradient fits VMEM beside a window of up to 128 keys, with at most 128 heads, by bytes of a
# number (kernel_backward.py, `_plan`). A longer window leaves room for fewer; its gradient may then be refused.
MASKED_GRADIENT = {2: {"v5p": 20480, "v6e": 40960, "tpu7x": 20480}, 4: {"v5p": 10752, "v6e": 24320, "tpu7x": 10752}}
# A selection that reads more than an eighth of the entries gains nothing from leaving out the rest.
SPARSE_SHARE = 8


def choose(queries: int, entries: int, top_k: int, chip: str, itemsize: int = 2) -> str:
  """"masked", "sparse" or "blockwise".

  Args:
    queries, entries: of one row of the batch, as in `attend`.
    top_k: the most entries that a query reads; `entries` if nothing is left out.
    chip: name of a `tpu.Chip`.
    itemsize: bytes of a number of queries and entries, 2 or 4.
  """
  if queries < (FEW_QUERIES if top_k < entries else FEW_QUERIES_OF_ALL)[chip]:
    return "blockwise"
  if top_k < entries and entries > MASKED_GRADIENT[itemsize][chip]:
    return "sparse"  # the only one with a gradient
  return "sparse" if entries > MOST_MASKED and top_k * SPARSE_SHARE < entries else "masked"
