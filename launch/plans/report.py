"""The figures of a plan as lines to read."""

from __future__ import annotations

from typing import Any, Mapping

from deepseek_v4.planning.read import SHARE

GIB, GB, TERA = 2**30, 1e9, 1e12


def text(figures: Mapping[str, Any]) -> str:
  """All of it: memory, kernels, collectives, FLOPs, bounds."""
  return "\n".join([*_memory(figures), *_kernels(figures), *_traffic(figures), *_bounds(figures)])


def _memory(figures: Mapping[str, Any]) -> list[str]:
  memory, room = figures["memory"], figures["hbm_bytes"]
  done = "laid out, without its machine code (a guess stands for it)," if figures["layout"] else "compiled"
  lines = [f"{done} in {figures['compile_seconds']:.0f} s of {figures['seconds']:.0f} s, with at most "
           f"{figures['host_bytes'] / GIB:.1f} GiB of this machine, for {figures['devices']} devices; GiB of one device:"]
  lines += [f"  {name:12}{size / GIB:8.2f}" for name, size in memory.items()]
  lines += ["of the arguments:"] + [f"  {name:12}{size / GIB:8.2f}" for name, size in figures["state"].items()]
  share = memory["all"] / room
  verdict = "fits" if figures["fits"] else f"DOES NOT FIT, expected at most {SHARE:.0%}"
  return lines + [f"{share:.1%} of the {room / GIB:.2f} that the compiler lets a program use: {verdict} "
                  f"(held at one time: {memory['peak'] / room:.1%})"]


def _kernels(figures: Mapping[str, Any]) -> list[str]:
  basis = f", of {figures['with_bundles']} shapes also by the compiler's schedule" if figures["with_bundles"] else ""
  lines = [f"kernels: calls in a step, TFLOP that they multiply, GB of HBM, least ms by these{basis}"]
  lines += [f"  {name:32}{row['calls']:7}{row['flops'] / TERA:10.2f}{row['bytes'] / GB:10.2f}{row['seconds'] * 1e3:10.2f}"
            for name, row in figures["kernels"].items()] or ["  none"]
  return lines


def _traffic(figures: Mapping[str, Any]) -> list[str]:
  lines = ["collectives: GB that a device receives in a step, how many the program has, how many beside other work",
           "(a ragged exchange as if its room were filled; + GB for each run of a loop whose length depends on the data)"]
  more = lambda found: f"   + {found['more'] / GB:.2f}" if found["more"] else ""
  lines += [f"  {kind:20}{found['bytes'] / GB:8.2f}{found['count']:5}{found['started']:5}{more(found)}"
            for kind, found in figures["traffic"].items()] or ["  none"]
  gather, layer = figures["largest_gather"] / 1e6, figures["dense_layer"] / 1e6
  return lines + [f"after the largest all-gather a device has {gather:,.1f} M numbers; of a layer all weights but the "
                  f"routed experts' are at most {layer:,.1f} M"]


def _bounds(figures: Mapping[str, Any]) -> list[str]:
  flops, least = figures["flops"], figures["bounds"]
  lines = ["TFLOP of one device in a step: "
           + ", ".join(f"{name} {flops[name] / TERA:,.1f}" for name in ("model", "hardware", "matmuls", "kernels"))]
  if flops["more"]:
    lines[-1] += f"; + {flops['more'] / TERA:,.1f} for a run of what depends on the data"
  lines += ["least seconds of a step: " + ", ".join(f"{name} {least[name]:.3f}" for name in (
    "matmuls", "kernels", "compute", "hbm", "exposed", "hidden", "step"))]
  return lines + [f"model FLOPs utilisation that this allows: {figures['utilization']:.1%}"]
