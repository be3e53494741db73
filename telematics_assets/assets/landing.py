"""The landing folders as assets that are observed, never made.

Belongs here: the spec of a landing asset and what an observation of it says.
Does not belong here: noticing by itself that something landed (`automation.py`), staging files.

https://docs.dagster.io/guides/build/assets/external-assets
"""

import warnings

import dagster as dg

from telematics_assets.assets.boundary import failures_for_dagster
from telematics_assets.catalog import FileStream, Names
from telematics_assets.engines.base import Engine
from telematics_assets.metadata import pending_metadata
from telematics_assets.volumes.base import Volume


def landing_key(stream: FileStream) -> dg.AssetKey:
    """The asset key of a stream's landing folder."""
    return dg.AssetKey(["landing", stream.name])


def landing_asset(stream: FileStream, names: Names) -> dg.AssetsDefinition:
    """The landing folder of a stream, observable on demand.

    Args:
        stream: Any file stream.
        names: The deployment's catalog, schemas and Volume.
    """
    path = f"{names.volume_location}/{stream.folder}"
    spec = dg.AssetSpec(
        key=landing_key(stream),
        description=f"Files of format {stream.format} that land in `{path}`, at any depth.",
        group_name="landing",
        kinds={stream.format, "file"},
        owners=list(stream.contract.owners),
        tags=dict(stream.contract.tags) | {"layer": "landing"},
        code_version="1",
        metadata={"path": path, "format": stream.format},
    )

    def observe(
        context: dg.AssetExecutionContext, engine: dg.ResourceParam[Engine], landing: dg.ResourceParam[Volume]
    ) -> dg.ObserveResult:
        with failures_for_dagster(context):
            pending = engine.look(stream)
        return dg.ObserveResult(
            asset_key=spec.key,
            data_version=dg.DataVersion(pending.data_version),
            metadata=pending_metadata(pending) | {"dagster/uri": f"{landing.uri}/{stream.folder}"},
        )

    with warnings.catch_warnings():
        # The decorator is marked as beta; the one without that mark has no owners and no kinds.
        warnings.simplefilter("ignore", dg.BetaWarning)
        asset: dg.AssetsDefinition = dg.multi_observable_source_asset(specs=[spec], name=f"observe_{stream.name}")(
            observe
        )
    return asset
