"""Native ops under moejax and their specification."""

from custom_ops.grouped_matmul import GROUPED_PRODUCT as GROUPED_PRODUCT
from custom_ops.grouped_matmul import grouped_matmul as grouped_matmul
from custom_ops.grouped_matmul import grouped_matmul_dlhs as grouped_matmul_dlhs
from custom_ops.grouped_matmul import grouped_matmul_drhs as grouped_matmul_drhs
from custom_ops.permute import permute as permute
from custom_ops.permute import unpermute as unpermute
from custom_ops.plan import DispatchPlan as DispatchPlan
from custom_ops.plan import make_plan as make_plan
from custom_ops.swiglu import swiglu as swiglu
from custom_ops.swiglu import swiglu_backward as swiglu_backward
