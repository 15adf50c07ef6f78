"""Reading compiled programs: snippets as XLA writes them on CPU and TPU, with the numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax.compile import hlo

LOOP = """HloModule jit_f, is_scheduled=true

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p0: bf16[4,128,256], p1: s32[], p2: bf16[64,128]) -> bf16[64,256] {
  %p0 = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %p2 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,128,256]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,128,256}
  %one = bf16[128,256]{1,0} bitcast(%slice)
  ROOT %product = bf16[64,256]{1,0} convolution(%p2, %one), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[4,128,256], bf16[64,128])) -> (s32[], bf16[4,128,256], bf16[64,128]) {
  %arg = (s32[]{:T(128)}, bf16[4,128,256]{2,1,0}, /*index=2*/bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w = bf16[4,128,256]{2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[64,128]{1,0} get-tuple-element(%arg), index=2
  %y = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/mlp"}, backend_config={"estimated_cycles":"1000"}
  %sum = (f32[10]{0}, bf16[20]{0:T(256)(128)(2,1)S(1)}) all-reduce(%i, %i), channel_id=1, replica_groups=mesh['a'=4,'b'=16] {'b'}, to_apply=%region_0.1
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %step)
  ROOT %out = (s32[], bf16[4,128,256], bf16[64,128]) tuple(%next, %w, %x)
}

%condition (arg: (s32[], bf16[4,128,256], bf16[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %arg = (s32[]{:T(128)}, bf16[4,128,256]{2,1,0}, bf16[64,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (w: bf16[4,128,256], x: bf16[64,128]) -> bf16[64,128] {
  %w = bf16[4,128,256]{2,1,0} parameter(0)
  %x = bf16[64,128]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], bf16[4,128,256], bf16[64,128]) tuple(%zero, %w, %x)
  %loop = (s32[], bf16[4,128,256], bf16[64,128]) while(%start), condition=%condition, body=%body
  ROOT %end = bf16[64,128]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def entry(*lines, head=""):
    body = "\n".join(f"  {line}" for line in lines)
    start = "ENTRY %main (x: f32[8,16]) -> f32[8,16] {\n  %x = f32[8,16]{1,0} parameter(0)\n"
    return f"HloModule m\n\n{head}{start}{body}\n}}\n"


def test_what_a_loop_holds_counts_as_often_as_it_runs():
    program = hlo.read(LOOP, 64)
    assert program.flops == 4 * 2 * 64 * 128 * 256
    assert program.flops_by_dtype() == {"bf16": program.flops}
    (found,) = program.collectives
    # Rings of 16: 10 float32 and 20 bfloat16 values, twice 15/16 of them, four times.
    assert (found.kind, found.group, found.times) == ("all-reduce", 16, 4)
    assert found.total == pytest.approx(4 * 2 * 15 / 16 * 80)
    fusion = next(each for each in program.operations if each.opcode == "fusion")
    # One layer of the weights, not all four, and x; the result stays on the chip. (A scalar index counts too.)
    assert fusion.bytes == 128 * 256 * 2 + 64 * 128 * 2 + 4 and fusion.times == 4
    assert fusion.cycles == 1000 and fusion.source == "jit(f)/mlp"


def test_a_known_trip_count_is_believed():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.read(text, 64).collectives[0].times == 7


def test_a_counter_may_be_unsigned_start_late_and_take_long_steps():
    """As in the loops that XLA makes of a gather and a product: two parts of the weights at a time."""
    text = LOOP.replace("constant(4)", "constant(8)").replace("s32[]{:T(128)} constant", "u32[]{:T(128)} constant")
    text = text.replace("%zero = u32[]{:T(128)} constant(0)\n  %start", "%zero = u32[]{:T(128)} constant(2)\n  %start")
    text = text.replace("%step = u32[]{:T(128)} constant(1)", "%step = u32[]{:T(128)} constant(2)")
    assert hlo.read(text, 64).collectives[0].times == (8 - 2) / 2
    assert hlo.read(LOOP, 64).collectives[0].times == 4


@pytest.mark.parametrize(
    "old, new",
    [
        ("compare(%i, %limit), direction=LT", "fusion(%i, %limit), kind=kLoop, calls=%region_0.1"),
        ("compare(%i, %limit), direction=LT", "compare(%i, %limit), direction=NE"),
        ("%limit = s32[]{:T(128)} constant(4)", "%limit = s32[]{:T(128)} get-tuple-element(%arg), index=0"),
        ("add(%i, %step)", "multiply(%i, %step)"),
        ("tuple(%zero, %w, %x)", "fusion(%w, %x), kind=kLoop, calls=%fused"),
    ],
)
def test_a_loop_that_cannot_be_read_counts_once_and_is_named(old, new):
    assert hlo.read(LOOP, 64).unread == ()
    program = hlo.read(LOOP.replace(old, new), 64)
    assert program.unread == ("loop",) and program.collectives[0].times == 1


def test_a_window_s_numbers_are_of_the_axes_in_order_whatever_their_place():
    """A product of (140, 2 x 80) and (2 x 80, 16 x 80), as a TPU's compiler writes it."""
    line = (
        "%r = bf16[1,140,16,80,1]{3,2,1,0,4} convolution(%l, %k), window={size=1x16x2 pad=0_0x15_15x0_0 "
        "rhs_reversal=0x1x0}, dim_labels=b02f1_2i1o0->b01f2"
    )
    text = entry(
        "%l = bf16[1,140,2,80,1]{3,2,1,0,4} parameter(1)", "%k = bf16[2,80,16,80,1]{3,2,1,0,4} parameter(2)", line
    )
    assert hlo.read(text, 1).flops == 2 * 140 * (2 * 80) * (16 * 80)


@pytest.mark.parametrize(
    "line, kind, group, sent",
    [
        (
            "%r = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add",
            "all-reduce",
            2,
            2 / 2 * 512,
        ),
        ("%r = f32[8,16]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 8, 2 * 7 / 8 * 512),
        (
            "%r = f32[32,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            "all-gather",
            4,
            3 / 4 * 2048,
        ),
        (
            "%r = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]",
            "all-gather",
            4,
            3 / 4 * 2048,
        ),
        (
            "%r = f32[2,16]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add",
            "reduce-scatter",
            4,
            3 * 128,
        ),
        ("%r = f32[8,16]{1,0} all-to-all(%x), replica_groups=[2,4]<=[4,2]T(1,0)", "all-to-all", 4, 3 / 4 * 512),
        ("%r = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 2, 512),
        ("%r = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}", "collective-permute", 1, 0),
        (
            "%r = f32[8,16]{1,0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, to_apply=%add",
            "all-reduce",
            2,
            2 / 2 * 512,
        ),
    ],
)
def test_a_ring_sends(line, kind, group, sent):
    (found,) = hlo.read(entry(line), 8).collectives
    assert (found.kind, found.group) == (kind, group) and found.bytes == pytest.approx(sent)
    assert found.overlapped == ("-start" in line)


def test_the_second_half_of_an_asynchronous_collective_is_no_other():
    text = entry(
        "%s = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]",
        "%r = f32[32,16]{1,0} all-gather-done(%s)",
    )
    assert len(hlo.read(text, 8).collectives) == 1


SLICE = """%wrapped (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %part = f32[2,16]{1,0:T(2,128)S(1)} slice(%p), slice={[0:2], [0:16]}
}

"""
GATHER = """%wrapped (p: f32[8,16], i: s32[4]) -> f32[4,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  ROOT %rows = f32[4,16]{1,0} custom-call(%p, %i), custom_call_target="SparseGather", called_computations={%other}
}

"""
SUM = """%wrapped (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %sum = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

"""


def test_what_runs_asynchronously_counts_once_where_it_starts():
    text = entry(
        "%s = ((f32[8,16]{1,0}), f32[2,16]{1,0:T(2,128)S(1)}, s32[]{:S(2)}) async-start(%x), calls=%wrapped",
        "%r = f32[2,16]{1,0:T(2,128)S(1)} async-done(%s)",
        head=SLICE,
    )
    (found,) = hlo.read(text, 4).operations
    assert found.bytes == 2 * 16 * 4 and found.overlapped  # read from HBM, written to the core's memory
    # The sparse cores are started before they are given what to gather.
    text = entry(
        "%i = s32[4]{0} parameter(1)",
        "%s = ((), (), (s32[99]{0:T(1)S(15)}, s32[0]{0})) async-start(), calls=%wrapped",
        "%u = ((f32[8,16]{1,0}, s32[4]{0}), f32[4,16]{1,0}, (s32[99]{0})) async-update(%s, %x, %i)",
        "%r = f32[4,16]{1,0} async-done(%u)",
        head=GATHER,
    )
    (found,) = hlo.read(text, 4).operations
    assert found.bytes == 2 * 4 * 16 * 4 and found.overlapped
    text = entry(
        "%s = ((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]) async-start(%x), calls=%wrapped",
        "%r = f32[8,16]{1,0} async-done(%s)",
        head=SUM,
    )
    program = hlo.read(text, 4)
    (found,) = program.collectives
    assert found.overlapped and found.bytes == 2 * 3 / 4 * 512 and program.bytes == 0


@pytest.mark.parametrize("space", ["S(1)", "S(3)"])
def test_what_lies_on_the_chip_is_no_traffic(space):
    text = entry(
        f"%a = f32[8,16]{{1,0:T(8,128){space}}} add(%x, %x)",
        f"%b = f32[2,16]{{1,0:T(2,128){space}}} slice(%x), slice={{[0:2], [0:16]}}",
        "%c = f32[2,16]{1,0} slice(%a), slice={[0:2], [0:16]}",
        "%d = f32[8,16]{1,0} dynamic-update-slice(%x, %b, %x, %x)",
        f"%e = f32[8,16]{{1,0:T(8,128){space}}} dynamic-update-slice(%a, %b, %x, %x)",
    )
    assert [each.bytes for each in hlo.read(text, 1).operations] == [512, 128, 128, 128, 0]


@pytest.mark.parametrize(
    "target, moved",
    [("AllocateBuffer", 0), ("ConcatBitcast", 0), ("AssumeGatherIndicesInBound", 0), ("tpu_custom_call", 2 * 512)],
)
def test_calls_that_only_name_buffers_are_free(target, moved):
    line = f'%r = f32[8,16]{{1,0}} custom-call(%x), custom_call_target="{target}"'
    assert hlo.read(entry(line), 1).bytes == moved


@pytest.mark.parametrize(
    "attributes", ["branch_computations={%small, %large, %small}", "true_computation=%large, false_computation=%small"]
)
def test_of_branches_the_dearest_counts(attributes):
    def branch(name, width):
        return (
            f"%{name} (p: f32[{width},16]) -> f32[{width},{width}] {{\n  %p = f32[{width},16]{{1,0}} parameter(0)\n"
            f"  ROOT %d = f32[{width},{width}]{{1,0}} dot(%p, %p), lhs_contracting_dims={{1}}, "
            f"rhs_contracting_dims={{1}}\n}}\n\n"
        )

    text = entry(
        f"%r = f32[8,8]{{1,0}} conditional(%x, %x, %x), {attributes}", head=branch("small", 4) + branch("large", 8)
    )
    program = hlo.read(text, 1)
    assert program.flops == 2 * 8 * 8 * 16 and len(program.operations) == 1


def test_a_collective_spread_over_fusions_counts_once_and_a_written_out_reduce_scatter_as_one():
    def fused(name, line):
        start = f"%{name} (p: f32[8,16]) -> f32[8,16] {{\n  %p = f32[8,16]{{1,0}} parameter(0)\n"
        return f"{start}  ROOT %c = {line}\n}}\n\n"

    chain = (
        'f32[8,16]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="2"}'
    )
    reduce = "f32[8,16]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add"
    head = fused("first", chain) + fused("second", chain) + fused("all-reduce-scatter.3", reduce)
    text = entry(
        *(
            f"%r{i} = f32[8,16]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}"
            for i, name in enumerate(("first", "second", "all-reduce-scatter.3"))
        ),
        head=head,
    )
    found = hlo.read(text, 4).collectives
    assert [(each.kind, each.overlapped) for each in found] == [("all-gather", True), ("reduce-scatter", False)]
    assert found[1].bytes == pytest.approx(3 / 4 * 512)  # what goes in is whole


def test_float32_products_take_as_many_passes_as_their_precision_says():
    line = (
        "%r = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}, "
        "operand_precision={highest,highest}"
    )
    (product,) = hlo.read(entry(line), 1).products
    assert product.flops == 2 * 8 * 8 * 16 and product.passes == 6
    assert hlo.read(entry(line), 1).operations[0].passes == 6 * product.flops


@pytest.mark.parametrize("given, message", [("nothing", "no ENTRY")])
def test_other_text_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        hlo.read(given, 1)


def counted(function, *shapes):
    """Our FLOPs and XLA's own of a compiled function without loops."""
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return hlo.read(compiled.as_text(), 1).flops, compiled.cost_analysis()["flops"]


def test_flops_of_what_jax_compiles_here_are_xla_s():
    ours, theirs = counted(lambda a, b: a @ b, (32, 48), (48, 64))
    assert ours == theirs == 2 * 32 * 48 * 64

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours, theirs = counted(convolve, (2, 16, 16, 8), (3, 3, 8, 4))
    # XLA's count leaves out taps on padding, and so does ours.
    assert ours == pytest.approx(theirs, rel=0.02) and ours < 2 * 2 * 8 * 8 * 4 * 9 * 8


def test_scans_count_fully_where_xla_counts_once():
    def scanned(x, w):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0]

    ours, theirs = counted(scanned, (16, 32), (5, 32, 32))
    assert ours == 5 * 2 * 16 * 32 * 32 and theirs < ours


def test_an_autoencoder_s_flops_by_hand_are_those_of_its_program():
    from marjax.perf import flops
    from marjax.tokenizers import autoencoder
    from marjax.tokenizers.spec import Spec

    spec = Spec(
        width=32,
        channel_mults=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        embed_dim=8,
        encoder_attn_resolutions=(128,),
    )
    params = autoencoder.abstract_params(spec)
    network = autoencoder.Autoencoder(spec)
    for method, shape, by_hand in zip(
        ("encode", "decode"), ((1, 16, 16, 3), (1, 8, 8, 8)), flops.autoencoder_flops(spec, 16), strict=True
    ):
        given = jax.ShapeDtypeStruct(shape, jnp.float32)
        run = jax.jit(lambda params, x, method=method: network.apply({"params": params}, x, method=method))
        program = hlo.read(run.lower(params, given).compile().as_text(), 1)
        # Padding makes up the difference: at 16 pixels a border of 3 x 3 taps is some percent.
        assert 0.85 * by_hand < program.flops <= by_hand, method
    assert np.isfinite(by_hand)
