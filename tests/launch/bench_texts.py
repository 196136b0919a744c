"""What the tests of the kernels' bench read in place of a compiler's answer: a schedule's text and an answer made of it."""

import dataclasses

from launch.benchmarks.kernels import program, schedule
from launch.benchmarks.kernels.chips import CHIPS

V5P, V6E, TPU7X = CHIPS

# A grid of 8 steps (two more of the pipeline) with a start, a tile, and a finish that loops three times.
LINES = """\
     0   :  { %s0 = smov 0 }
   0x1   :  { %2 = dma.hbm_to_smem /*hbm=*/%s1, /*size_in_granules=*/4 }
   0x2 LB: > { %s1 = sphi 0 } /* Start region 9 */
   0x3   : > { %4 = shalt.err (!%p) /* BoundsCheck 0 for %5 = dma.hbm_to_vmem /*hbm=*/%s1, /*size_in_granules=*/64
hlo: kernel
 */ }
   0x4   : > { %5 = dma.hbm_to_vmem [thread:$0]  (%p1), /*hbm=*/%s1, /*size_in_granules=*/64, /*vmem=*/%s3 /*
base_bounds: (1, 2) */ }
   0x5   : > { %6 = sbr.rel (%p1) target = $region3 }
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
   0x9   : > {}
   0xa   : > { %7 = vadd }
   0xb   : > { %7 = vadd }
   0xc PF: > { %8 = sld } /* Start/End empty region 3 :: Start region 4 */
   0xd   : > { %9 = sbr.rel (!%p2) target = $region5 }
   0xe   : > {}
   0xf   : > {}
  0x10   : > {}
  0x11   : > {}
  0x12   : > { %7 = vmatmul }
  0x13   : > { %7 = vmatmul }
  0x14   : > { %7 = vmatmul }
  0x15 PF: > { %8 = sbr.rel (%p3) target = $region6 } /* Start/End empty region 5 */
  0x16   : > {}
  0x17   : > {}
  0x18   : > {}
  0x19   : > {}
  0x1a LB: >> { %8 = vadd } /* Start region 7 */
  0x1b   : >> { %p4 = scmp.ge.s32.totalorder (%p9), %s5, 3 /* loop exit test */ }
  0x1c   : > { %9 = sbr.rel (!%p4) target = $region7 }
  0x1d   : >> {}
  0x1e   : >> {}
  0x1f   : >> {}
  0x20   : >> {} /* End region 7 :: End region 8 */
  0x21 PF: > { %p5 = scmp.ge.s32.totalorder %s5, 10 /* loop exit test */ } /* Start/End empty region 6 */
  0x22   :  { %9 = sbr.rel (!%p5) target = $region9 }
  0x23   : > {}
  0x24   : > {}
  0x25   : > {}
  0x26   : > {} /* End region 9 */
  0x27   :  { %s0 = smov 0 }
"""
WORK = {0xa: (0, 40, 0), 0xb: (0, 40, 0), 0x12: (50, 20, 0), 0x13: (50, 20, 3), 0x14: (50, 20, 3), 0x1a: (0, 80, 0)}
UNITS = "== CAPACITY:\nMXU, VALU, VSTORE:SPILL\n 4 4 1\n== UTILIZATION:\n" + "\n".join(
    " ".join(map(str, WORK.get(number, (0, 0, 0)))) for number in range(0x28))


def kernel_schedule():
  return schedule.read("kernel.1", LINES, UNITS)


def attention_call(chip, length=16384, rows=1024, entries=512):
  blocks = (None, rows, 512), (None, rows // 128, 128), (None, entries, 512), (None, 256, 512)
  return program.Call("masked_attention", (chip.cores, length // (rows // 128) // chip.cores, None), blocks, (), chip.cores)


def answer(**changes):
  call = attention_call(V5P)
  part = program.Part("masked_attention.1", True, 1, True, 10**9, 12 * 2**20)
  found = dataclasses.replace(kernel_schedule(), name="masked_attention.1")
  return {"ok": True, "seconds": 3.0, "memory": {"temp": 2**20}, "cost": {}, "matmul_flops": 0,
          "parts": [dataclasses.asdict(part)], "calls": [dataclasses.asdict(call)], "schedules": [found.as_json()]} | changes
