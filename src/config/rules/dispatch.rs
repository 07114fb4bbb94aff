//! What concurrent dispatch needs of the workers: they must be pdlink's own, and prefill must push while it computes.

use crate::config::{ConnectorImpl, Dispatch, KvSendType};

use super::Bench;

pub(super) fn judge(bench: &mut Bench<'_>) {
    let pd = &bench.config.pd_disagg;
    if bench.config.proxy.dispatch != Dispatch::Concurrent || !pd.enabled {
        return;
    }
    let (is_native, send_type) = (pd.connector_impl == ConnectorImpl::Native, pd.send_type());
    if !is_native {
        bench.refuse(
            &["proxy.dispatch", "pd_disagg.connector_impl"],
            "is \"concurrent\", but connectors of vLLM's own take a transfer only from prefill's answer",
            "set `connector_impl = \"native\"`, or `dispatch = \"sequential\"`",
        );
    } else if send_type != KvSendType::PutAsync {
        bench.refuse(
            &["proxy.dispatch", "pd_disagg.kv_send_type"],
            format!(
                "is \"concurrent\", but with `kv_send_type = \"{}\"` no KV moves before prefill has ended",
                send_type.name()
            ),
            "set `kv_send_type = \"PUT_ASYNC\"`, or `dispatch = \"sequential\"`",
        );
    }
}
