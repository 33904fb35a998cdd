"""Claims about reading a compiled module: groups of devices, loops, bytes, memory; on texts in the compiler's notation."""

import pytest

from r1jax.plan import hlo

MESH = {"data": 2, "fsdp": 2, "expert": 4}

MODULE = """HloModule jit_step, is_scheduled=true

%condition (p.0: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(26)
  %counter = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%inner_condition (p.1: (s32[], s32[])) -> pred[] {
  %a = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %b = s32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%inner (p.2: (s32[], s32[])) -> (s32[], s32[]) {
  %ragged.1 = bf16[64,2,8]{2,1,0:T(2,128)(2,1)} ragged-all-to-all(%x, %y, /*index=5*/%z), channel_id=1, replica_groups=[2,8]<=[16]
}

%body (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], s32[]) while(%tuple.9), condition=%inner_condition, body=%inner
  %all-gather.1 = bf16[1,32,64]{2,1,0:T(8,128)(2,1)} all-gather(%w), channel_id=3, replica_groups=[8,2]<=[2,2,4]T(0,2,1), dimensions={1}, metadata={op_name="jit(step)/while/body/gather"}
}

%unused (p.4: f32[]) -> f32[] {
  ROOT %all-reduce.9 = f32[] all-reduce(%p.4), replica_groups={}
}

ENTRY %main (w: f32[8], x: f32[8]) -> f32[8] {
  %while.2 = (s32[], f32[8]{0:T(128)}) while(%tuple.1), condition=%condition, body=%body
  %all-reduce.1 = (f32[8]{0:T(128)}, f32[]{:T(128)}) all-reduce(%g, %h), channel_id=2, replica_groups=mesh['x'=2,'y'=8] {'x'}, to_apply=%add
  %permute-start = (f32[4,8]{1,0:T(4,128)}, f32[4,8]{1,0:T(4,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v), channel_id=1, source_target_pairs={{0,1},{1,0},{4,5},{5,4}}
}
"""


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, use_global", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}, use_global", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}, use_global", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}, use_global", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(2)2}, use_global", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", [[0, 1, 2]]),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(text, expected):
    assert hlo.groups(f"  %c = f32[2]{{0}} all-reduce(%x), {text}, to_apply=%add", 4) == expected


@pytest.mark.parametrize(
    "group, axes",
    [
        ([0, 1, 2, 3], ("expert",)),
        ([0, 4], ("fsdp",)),
        ([0, 8], ("data",)),
        (list(range(8)), ("fsdp", "expert")),
        ([0, 4, 8, 12], ("data", "fsdp")),
        ([0, 1], ()),
        ([3], ()),
    ],
)
def test_a_group_is_named_by_the_whole_axes_it_spans(group, axes):
    assert hlo.spanned([group], MESH) == axes


def test_collectives_carry_kind_axes_bytes_and_how_often_a_loop_runs_them():
    found = {one.name: one for one in hlo.collectives(MODULE, MESH)}
    assert sorted(found) == ["all-gather.1", "all-reduce.1", "permute-start", "ragged.1"]
    gather, reduce, permute, ragged = (
        found[name] for name in ("all-gather.1", "all-reduce.1", "permute-start", "ragged.1")
    )
    assert (gather.kind, gather.axes, gather.bytes, gather.runs, gather.in_loop) == (
        *("all-gather", ("fsdp",), 32 * 64 * 2, 26, False),
    )
    assert gather.op_name == "jit(step)/while/body/gather"
    assert (reduce.kind, reduce.axes, reduce.bytes, reduce.runs) == ("all-reduce", ("data",), 36, 1)
    assert (permute.kind, permute.group_size, permute.bytes) == ("collective-permute", 2, 4 * 8 * 4)
    assert (ragged.axes, ragged.runs, ragged.in_loop) == (("fsdp", "expert"), 26, True)


def test_what_is_sent_between_slices_goes_by_the_first_axis():
    line = (
        "  %send.1 = (f32[1,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=10, "
        'frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    (found,) = hlo.collectives(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}\n", {"slice": 2, **MESH})
    assert (found.kind, found.axes, found.group_size, found.bytes) == ("all-reduce", ("slice",), 2, 4096)


def result(kind, *dims):
    return hlo.Collective("c", kind, (hlo.ArrayShape("bf16", dims),), 2, ("fsdp",), 1, False, "")


def test_a_gathered_weight_is_found_whole_in_part_and_transposed_and_its_gradient_is_not():
    weight = [((2, 64, 24), (16, 64, 48))]
    found = [
        result("all-gather", 16, 64, 48),
        result("all-gather", 1, 4, 64, 24),
        result("all-gather", 64, 48, 2),
        result("collective-permute", 16, 64, 24),
    ]
    other = [
        result("all-reduce", 2, 64, 24),  # a device's own part: its gradient summed over copies
        result("all-gather", 5, 64, 24),  # 5 experts are no whole number of parts
        result("reduce-scatter", 16, 64, 48),
        result("all-gather", 128, 64),
    ]
    assert hlo.gathered(found + other, weight) == found


def test_bytes_count_bits_of_every_dtype():
    text = "(bf16[4,8]{1,0:T(8,128)(2,1)}, f8e4m3fn[16], pred[3], s4[6], f32[], u32[]{:S(2)})"
    assert [shape.bytes for shape in hlo.shapes(text)] == [64, 16, 3, 3, 4, 4]


def test_memory_counts_hbm_alone():
    text = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <8 reduce_sum.11 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 2000, page 0, parameter 0, shape |f32[512,1024]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 300, page 0, parameter 1, shape |f32[256,512]| at ShapeIndex {}:
allocation 5: size 40, page 0, maybe-live-out:
allocation 6: size 7, page 0, constant:
allocation 13: size 8, color 2, page 0, preallocated-temp:
allocation 14: size 5000, page 0, preallocated-temp:
allocation 15: size 90000, color 1, page 0, preallocated-temp:
"""
    memory = hlo.memory(text)
    assert memory == hlo.Memory(arguments=2300, outputs=2040, aliased=2000, temporaries=5000, constants=7)
    assert memory.total == 2300 + 40 + 5000 + 7
