"""``model.save_to`` and ``restore_from``: a trained model's weights at another layout, through a real trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import training_kit as kit
from harness import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def prepare(root: Path, *words: str):
    """Config, data and trainer of a run, as ``nemo-kto train`` makes them."""
    from nemo_kto.config.architecture import read_architecture
    from nemo_kto.config.load import load_config
    from nemo_kto.config.world import world_from_environment
    from nemo_kto.data.tokenize import build_store
    from nemo_kto.training.run_data import RunData
    from nemo_kto.training.trainer import build_trainer

    config = load_config(
        [
            f"pretrained_checkpoint.restore_from_path={root / 'model'}",
            f"model.data.data_prefix.train=[{root / 'train.jsonl'}]",
            f"model.data.cache_dir={root / 'cache'}",
            *("model.data.seq_length=64", "model.data.num_workers=0", "trainer.precision=32"),
            *("model.global_batch_size=4", "model.micro_batch_size=2", "model.optim.lr=1e-2"),
            *("model.optim.sched.name=Constant", "model.optim.sched.warmup_steps=0", "trainer.kto.max_steps=2"),
            *("exp_manager.create_checkpoint_callback=false", "exp_manager.create_tensorboard_logger=false"),
            *words,
        ]
    )
    Path(config.exp_manager.explicit_log_dir).mkdir(exist_ok=True)
    store = build_store(config.model.data.data_prefix.train, root / "model", config.model.data)
    data = RunData(config, store, None, read_architecture(root / "model"))
    return config, data, build_trainer(config, data, world_from_environment())


def sums(model) -> dict[str, torch.Tensor]:
    """Whole parameters of this rank, by names that count layers over all stages."""
    from nemo_kto.gpt.network import unwrap

    return {n: p.detach().clone() for chunk in model.chunks for n, p in unwrap(chunk).global_parameters()}


def scenario(rank: int, root: Path) -> dict[str, object]:
    from nemo_kto import cpu_backend

    cpu_backend.install()
    from nemo_kto.errors import KTOError
    from nemo_kto.training.kto_model import MegatronGPTKTOModel

    found: dict[str, object] = {}
    tp2 = ("model.tensor_model_parallel_size=2", f"exp_manager.explicit_log_dir={root / 'tp2'}")
    config, data, trainer = prepare(root, *tp2)
    model = MegatronGPTKTOModel(config, trainer, data)
    found["too early"] = refused(KTOError, lambda: model.save_to(str(root / "early.nemo")))
    trainer.fit(model)
    model.save_to(str(root / "trained.nemo"))
    found["steps before"] = model.trained_steps
    found["tp2"] = sums(model)
    pp2 = ("model.pipeline_model_parallel_size=2", f"exp_manager.explicit_log_dir={root / 'pp2'}")
    config, data, trainer = prepare(root, *pp2, "trainer.kto.max_steps=1")
    restored = MegatronGPTKTOModel.restore_from(
        str(root / "trained.nemo"), override_config_path=config, trainer=trainer, data=data
    )
    trainer.strategy.connect(restored)
    trainer.strategy.setup_environment()
    restored.configure_model()
    found["pp2"] = sums(restored)
    found["reference"] = (
        restored.run.model.kto.reference_from_path == restored.run.pretrained_checkpoint.restore_from_path
    )
    config, data, trainer = prepare(root, *pp2, "trainer.kto.max_steps=1")
    trained = MegatronGPTKTOModel.restore_from(str(root / "trained.nemo"), config, trainer, data)
    trainer.fit(trained)
    found["steps after"] = trained.trained_steps
    found["kl"] = float(trainer.callback_metrics["kl"])
    connector = trained._save_restore_connector
    found["arguments"] = refused(KTOError, lambda: connector.restore_from(MegatronGPTKTOModel, "x.nemo", strict=False))
    found["no run"] = refused(KTOError, lambda: connector.restore_from(MegatronGPTKTOModel, "x.nemo"))
    found["unpickling"] = refused(KTOError, lambda: connector.extract_state_dict_from("x.nemo", "out"))
    return found


def refused(kind, action) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "done"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("connector")
    tiny.make_model(root / "model", tie_word_embeddings=True, **kit.SIZES)
    tiny.make_records(root / "train.jsonl", 12)
    results = run_ranks(2, scenario, root, timeout=400)
    return root, results


def test_a_trained_model_is_restored_at_another_layout(found):
    """Each pipeline stage must hold what the tensor-parallel ranks held together."""
    from nemo_kto.checkpoint import hf_names
    from nemo_kto.config.architecture import read_architecture

    root, ranks = found
    arch = read_architecture(root / "model")
    checked = set()
    for rank in ranks:
        for name, parameter in rank["pp2"].items():
            rule = hf_names.rule_for(arch, name)
            source = "embedding.word_embeddings.weight" if name == "output_layer.weight" else name  # tied
            whole = hf_names.assemble(rule, arch, [other["tp2"][source] for other in ranks])
            single = hf_names.assemble(rule, arch, [parameter])
            assert kit.same(whole, single), name
            checked.add(source)
    assert checked == set(ranks[0]["tp2"])


def test_training_goes_on_from_there(found):
    for rank in found[1]:
        assert rank["steps before"] == 2
        assert rank["steps after"] == 1
        assert rank["reference"]
        assert rank["kl"] == 0.0, "policy and reference are the archive's, so the first step sees no divergence"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too early", "the model has no weights before its trainer has set it up"),
        ("arguments", "map_location, strict, return_config and validate_access_integrity are fixed"),
        ("no run", "restore_from needs override_config_path"),
        ("unpickling", "the weights of a .nemo file are sharded"),
    ],
)
def test_what_the_connector_does_not_do_is_refused(name, message, found):
    ranks = found[1] if name != "too early" else found[1][:1]  # NeMo asks rank 0 alone before there are groups
    for rank in ranks:
        assert message in rank[name]
