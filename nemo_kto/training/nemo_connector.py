"""How NeMo saves and restores our model as ``.nemo``: sharded, at any layout, and without running what a file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

from nemo_kto.checkpoint.nemo_model import model_directory
from nemo_kto.checkpoint.nemo_save import save_nemo
from nemo_kto.config.architecture import read_architecture
from nemo_kto.config.schema import Config
from nemo_kto.data.cache import cache_root
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.training.run_data import RunData


class MegatronKTOConnector(SaveRestoreConnector):  # type: ignore[misc]
    """Saves the policy, its config and its tokenizer; restores a model that is to be trained further.

    NeMo's own unpacks the archive without our checks, builds the class that ``target`` names, and holds all weights
    on each rank.

    Args:
        data: of the run that a restored model belongs to; None where nothing is restored.
    """

    def __init__(self, data: RunData | None = None) -> None:
        super().__init__()
        self._data = data

    def save_to(self, model: Any, save_path: str) -> None:
        """Write ``save_path``. All ranks call it, through ``model.save_to``, while the policy is the live model.

        Raises:
            CheckpointError: on every rank: the model has no weights yet, or the archive cannot be written.
        """
        if not model.chunks:
            raise CheckpointError(f"{save_path}: the model has no weights before its trainer has set it up")
        if model.run.model.peft.peft_scheme != "none":
            raise CheckpointError(
                f"{save_path}: a .nemo archive holds a whole model: merge the adapters first, with "
                "`nemo-kto convert megatron-to-hf --merge`, then `nemo-kto convert to-nemo`"
            )
        arch = read_architecture(model.hf_side)
        save_nemo(model.chunks, arch, model.hf_side, Path(save_path), model.trainer.strategy.groups)

    def restore_from(  # noqa: PLR0913 - NeMo's signature
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: Config | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """A model whose policy starts from an archive. Weights are read when its trainer builds the network.

        Every rank unpacks, or finds what another has unpacked, in the run's ``model.data.cache_dir``. The reference is
        the archive's too, unless the config names another one.

        Args:
            calling_cls: the model's class.
            restore_path: the archive.
            override_config_path: the run's config.
            map_location: None: the trainer places the model.
            strict: True: weights fit exactly or not at all.
            return_config: False: an archive describes no run.
            trainer: as for the model's constructor.
            validate_access_integrity: True.

        Raises:
            CheckpointError: the archive is damaged, unsafe or unsupported.
            ConfigError: an argument asks for what is not done here.
        """
        if map_location is not None or not strict or return_config or not validate_access_integrity:
            raise ConfigError(
                "restore_from: map_location, strict, return_config and validate_access_integrity are fixed"
            )
        if not isinstance(override_config_path, Config) or trainer is None or self._data is None:
            raise ConfigError(
                "restore_from needs override_config_path (a nemo_kto Config), trainer and data of the run"
            )
        run = override_config_path
        place = str(model_directory(restore_path, cache_root(run.model.data.cache_dir)))
        start, kto = run.pretrained_checkpoint.restore_from_path, run.model.kto
        if kto.reference_from_path in (start, restore_path):
            run = replace(run, model=replace(run.model, kto=replace(kto, reference_from_path=place)))
        run = replace(run, pretrained_checkpoint=replace(run.pretrained_checkpoint, restore_from_path=place))
        return calling_cls(run, trainer, self._data)

    def load_config_and_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: NeMo's reader would unpickle the weights of an archive on this rank."""
        raise ConfigError("the weights of a .nemo file are sharded: convert it with `nemo-kto convert from-nemo`")

    extract_state_dict_from = load_config_and_state_dict
