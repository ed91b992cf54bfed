"""lm-evaluation-harness's own command line, with the model `mhmoe-np`.

python -m mhmoe_np.harness run --model mhmoe-np --model_args checkpoint=RUN --tasks wikitext
"""

from lm_eval.__main__ import cli_evaluate

import mhmoe_np.harness.lm_eval_model  # noqa: F401  (it registers the model)

cli_evaluate()
