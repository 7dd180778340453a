"""Forms for simulators: SCALE-Sim's own reader and operands, and Timeloop's rules for a problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures_cli import Teal
from fixtures_store import CHANNELS, dense, levels, write_store

from teal_cli import open_store
from teal_cli.errors import UsageError
from teal_cli.model.config import load_config
from teal_cli.registry.registry import Registry
from teal_cli.store.export import convert
from teal_cli.store.selection import select
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS

COUNT = 24
NAMES = ("q", "gate", "down", "o")
OUTPUTS = {"q": 16, "gate": 100, "down": 40, "o": 40}
CONFIG = """[general]
run_name = teal
[architecture_presets]
ArrayHeight = 8
ArrayWidth = 8
IfmapSramSzkB = 64
FilterSramSzkB = 64
OfmapSramSzkB = 64
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Bandwidth = 10
Dataflow = ws
ReadRequestBuffer = 32
WriteRequestBuffer = 32
[layout]
IfmapCustomLayout = False
FilterCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = true
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulators") / "in.zarr"
    write_store(path, COUNT)
    return path


def measured(index: int, layer: int, name: str) -> float:
    """Density of what a projection consumes, from the numbers that the store was made of."""
    level = levels()[index]
    rows = np.abs(dense(level, PROJECTION_SITE[name], layer, COUNT))
    return float((rows > level.thresholds[layer, PROJECTIONS.index(name)]).mean())


def converted(store: Path, out: Path, form: str) -> Path:
    opened = open_store(store)
    for _ in convert(opened, out, form, select(opened, layers=[0, 2], names=NAMES)):
        pass
    return out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # SCALE-Sim leaves files open
def test_scale_sim_reads_its_layers(store: Path, tmp_path: Path) -> None:
    from scalesim.compute.operand_matrix import operand_matrix
    from scalesim.layout_utils import layouts
    from scalesim.scale_config import scale_config
    from scalesim.topology_utils import topologies

    out = converted(store, tmp_path / "out", "scalesim")
    (tmp_path / "scale.cfg").write_text(CONFIG)
    config = scale_config()
    config.read_conf_file(str(tmp_path / "scale.cfg"))
    for index, level in enumerate(("s0.50", "s0.90")):
        topology = topologies()
        topology.load_arrays(str(out / f"{level}.csv"), mnk_inputs=True)
        wanted = [(layer, name) for layer in (0, 2) for name in NAMES]
        assert topology.get_num_layers() == len(wanted)
        for number, (layer, name) in enumerate(wanted):
            channels = CHANNELS[PROJECTION_SITE[name]]
            assert topology.get_layer_name(number) == f"layer_{layer}_{name}"
            kept, group = topology.get_layer_sparsity_ratio(number)
            assert kept / group == pytest.approx(measured(index, layer, name), abs=0.5 / 64)
            operands = operand_matrix()
            operands.set_params(config, topology, layouts(), number)
            operands.create_operand_matrices()
            full = operands.sparse_filter_array
            assert full.shape == (channels, OUTPUTS[name])
            assert (full == full[:, :1]).all(), "a dropped channel spares its weights of every output"
            assert full[:64].sum() == OUTPUTS[name] * min(kept, channels)


def test_timeloop_problems_keep_its_rules(store: Path, tmp_path: Path) -> None:
    """What `Shape::Parse`, `ParseWorkloadInstance` and the density models of NVlabs/timeloop ask for."""
    out = converted(store, tmp_path / "out", "timeloop")
    for index, level in enumerate(("s0.50", "s0.90")):
        for layer in (0, 2):
            for name in NAMES:
                text = (out / level / f"layer_{layer}" / f"{name}.yaml").read_text()
                problem: Any = yaml.safe_load(text)["problem"]
                shape, instance = problem["shape"], problem["instance"]
                dimensions = shape["dimensions"]
                assert all(len(dimension) == 1 for dimension in dimensions)
                assert {d: instance[d] for d in dimensions} == {
                    "M": 1, "N": OUTPUTS[name], "K": CHANNELS[PROJECTION_SITE[name]]
                }  # fmt: skip
                spaces = {space["name"]: space for space in shape["data_spaces"]}
                assert [name for name, space in spaces.items() if space.get("read_write")] == ["Outputs"]
                for space in spaces.values():
                    assert all(
                        len(term) == 1 and term[0] in dimensions for rank in space["projection"] for term in rank
                    )
                densities = instance["densities"]
                assert densities.keys() == spaces.keys()
                assert {d["distribution"] for d in densities.values()} <= {"fixed-structured", "hypergeometric"}
                assert densities["Inputs"]["density"] == pytest.approx(measured(index, layer, name), abs=1e-6)
                assert densities["Weights"]["density"] == densities["Outputs"]["density"] == 1.0


def test_a_mask_that_keeps_nothing(tmp_path: Path) -> None:
    import zarr

    write_store(tmp_path / "in.zarr", 20)
    thresholds: Any = zarr.open_array(tmp_path / "in.zarr/s0.90/thresholds", mode="r+")
    thresholds[1, 0] = 100.0
    store = open_store(tmp_path / "in.zarr")
    chosen = select(store, levels=[0.9], layers=[1], names=["q"])
    list(convert(store, tmp_path / "a", "scalesim", chosen))
    list(convert(store, tmp_path / "b", "timeloop", chosen))
    assert (tmp_path / "a/s0.90.csv").read_text().splitlines()[1] == "layer_1_q, 1, 16, 63, 1:64,"
    assert "density: 0.000000" in (tmp_path / "b/s0.90/layer_1/q.yaml").read_text()


def test_widths_that_a_store_does_not_tell_come_from_the_model(ready: Path, teal: Teal, tmp_path: Path) -> None:
    made = tmp_path / "out.zarr"
    ran = teal("generate", "-p", "The quick", "--max-new-tokens", 4, "--ignore-eos", "--dump", made)
    assert ran.code == 0, ran.err
    ran = teal("store", "convert", made, "-o", tmp_path / "out", "--format", "scalesim")
    assert ran.code == 0, ran.err
    lines = (tmp_path / "out").glob("*.csv").__next__().read_text().splitlines()[1:]
    config = load_config(Registry().get("tiny").path)
    found = [(line.split(", ")[0], int(line.split(", ")[2]), int(line.split(", ")[3])) for line in lines]
    assert found == [
        (f"layer_{layer}_{name}", width, channels)
        for layer in range(config.layers)
        for name, width, channels in zip(PROJECTIONS, config.outputs(), config.inputs(), strict=True)
    ]
    note = json.loads((tmp_path / "out" / "teal.json").read_text())
    assert "masks" in " ".join(note["drops"])


@pytest.mark.parametrize("name", ["k", "attn_in"])
def test_without_the_model_k_and_v_are_refused(store: Path, teal: Teal, tmp_path: Path, name: str) -> None:
    opened = open_store(store)
    with pytest.raises(UsageError, match="how wide"):
        list(convert(opened, tmp_path / "out", "timeloop", select(opened, names=[name])))
    assert not (tmp_path / "out").exists()
    ran = teal("store", "convert", store, "-o", tmp_path / "out", "--format", "timeloop", "--names", name)
    assert ran.code == 2
    assert "leave out k, v and attn_in" in ran.err
