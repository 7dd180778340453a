"""Convert a store for SCALE-Sim v3, and have its systolic array count the cycles of each projection, dense and sparse.

python examples/simulate.py STORE FOLDER [LEVEL] [LAYER]

SCALE-Sim 3.0.0's model of memory fails with NumPy 2, so that only its array is run here; with NumPy 1,
`scalesim -c scale.cfg -t FOLDER/LEVEL.csv -i gemm` runs all of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scalesim.layout_utils import layouts
from scalesim.scale_config import scale_config
from scalesim.single_layer_sim import single_layer_sim
from scalesim.topology_utils import topologies

import teal_cli
from teal_cli.registry.registry import Registry
from teal_cli.store.export import convert
from teal_cli.store.selection import select

CONFIG = """[general]
run_name = teal
[architecture_presets]
ArrayHeight = 32
ArrayWidth = 32
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
SparsitySupport = {sparse}
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def main(path: str, folder: str, level: str = "0.5", layer: str = "0") -> None:
    store, out = teal_cli.open_store(path), Path(folder)
    part = select(store, levels=[level], layers=[int(layer)])
    for _ in convert(store, out, "scalesim", part, registry=Registry()):  # the model says how wide its outputs are
        pass
    topology = topologies()
    topology.load_arrays(str(out / f"{store.level(level).name}.csv"), mnk_inputs=True)
    dense, sparse = (cycles(topology, out / "scale.cfg", sparse) for sparse in (False, True))
    print("projection       ratio   dense  sparse  cycles")
    for number in range(topology.get_num_layers()):
        kept, group = topology.get_layer_sparsity_ratio(number)
        print(f"{topology.get_layer_name(number):15s} {kept:3d}:{group}  {dense[number]:6d}  {sparse[number]:6d}")


def cycles(topology: topologies, file: Path, sparse: bool) -> list[int]:
    """Cycles of the array for each line of the topology."""
    file.write_text(CONFIG.format(sparse=str(sparse).lower()))
    config, found = scale_config(), []
    config.read_conf_file(str(file))
    for number in range(topology.get_num_layers()):
        layer = single_layer_sim()
        layer.set_params(number, config, topology, layouts(), verbose=False)
        operands, array = layer.op_mat_obj, layer.compute_system
        inputs, weights, outputs = (
            get()[1] for get in (operands.get_ifmap_matrix, operands.get_filter_matrix, operands.get_ofmap_matrix)
        )
        array.set_params(
            config_obj=config,
            ifmap_op_mat=inputs,
            filter_op_mat=weights,
            ofmap_op_mat=outputs,
            sparsity_ratio_N=layer.sparsity_ratio_N,
            sparsity_ratio_M=layer.sparsity_ratio_M,
            ifmap_op_mat_original=operands.ifmap_addr_matrix_original,
            sparsity_filter_array=operands.sparse_filter_array,
        )
        found.append(len(array.get_demand_matrices()[0]))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
