//! `UCX_TLS`: the transports that UCX is allowed, wherever that is said.

use super::super::check::Answer;
use super::super::setting::Setting;
use super::Libraries;
use crate::config::KvMemory;

const VARIABLE: &str = "UCX_TLS";
/// Names that let all transports in.
const ALL: &str = "all";
/// Names by which GPU memory is moved.
const GPU: [&str; 4] = ["cuda", "cuda_copy", "cuda_ipc", ALL];

pub(super) fn check(libraries: &Libraries) -> Answer {
    let setting = &libraries.setting;
    let needed = setting.needs_nixl();
    let given = given(setting, |name| std::env::var(name).ok());
    if given.is_empty() {
        return if needed {
            Answer::ok("not limited: UCX takes the best transport that both sides have")
        } else {
            Answer::skipped("nothing goes over NIXL, and nothing limits UCX")
        };
    }
    let on_gpu = setting.memory() == Some(KvMemory::Gpu);
    let seen: Vec<String> = given.iter().map(|(place, value)| format!("{place} is \"{value}\"")).collect();
    let seen = seen.join("; ");
    let worst = given.iter().filter_map(|(_, value)| fault(value, on_gpu)).min();
    match worst {
        Some(fault @ (Fault::NoTcp | Fault::NoGpu)) => {
            Answer::fault(needed, format!("{seen}: {}", fault.text()), fault.mend())
        }
        Some(fault) => Answer::warn(format!("{seen}: {}", fault.text()), fault.mend()),
        None => Answer::ok(seen),
    }
}

/// Every place that says it, the strongest first.
fn given(setting: &Setting, own: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let mut given = Vec::new();
    let mut add = |place: &str, value: Option<String>| given.extend(value.map(|value| (place.to_owned(), value)));
    if let Some(config) = setting.config() {
        let nixl = &config.kv.nixl;
        add(
            "kv.nixl.parameters.engine_config",
            nixl.parameters.get("engine_config").and_then(|text| of_engine_config(text)),
        );
        add("pd_disagg.prefill_env.UCX_TLS", config.pd_disagg.prefill_env.get(VARIABLE).cloned());
        add("pd_disagg.decode_env.UCX_TLS", config.pd_disagg.decode_env.get(VARIABLE).cloned());
        add("kv.nixl.env.UCX_TLS", nixl.env.get(VARIABLE).cloned());
    }
    if given.is_empty() {
        given.extend(own(VARIABLE).map(|value| ("UCX_TLS in this environment".to_owned(), value)));
    }
    given
}

/// `rc,tcp` of `TLS=rc,tcp`.
fn of_engine_config(text: &str) -> Option<String> {
    let (before, value) = text.split_once("TLS=")?;
    before.chars().last().is_none_or(|c| !c.is_ascii_alphanumeric()).then(|| value.to_owned())
}

/// What is wrong with a list, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    NoTcp,
    NoGpu,
    OnlyTcp,
}

impl Fault {
    fn text(self) -> &'static str {
        match self {
            Self::NoTcp => "tcp is left out, over which UCX makes its connections and wakes its threads",
            Self::NoGpu => "nothing in it moves GPU memory, where KV lies",
            Self::OnlyTcp => {
                "only sockets are left: slower than the tcp path, and a reader that dies makes UCX end the process it reads from"
            }
        }
    }

    fn mend(self) -> &'static str {
        match self {
            Self::NoTcp => "add tcp to it; UCX takes it for bytes only where nothing better is there",
            Self::NoGpu => "add cuda to it",
            Self::OnlyTcp => "add what this machine has (rc for RDMA, sm, cuda), or use the tcp path in place of nixl",
        }
    }
}

fn fault(value: &str, on_gpu: bool) -> Option<Fault> {
    let (excludes, list) = match value.trim().strip_prefix('^') {
        Some(list) => (true, list),
        None => (false, value),
    };
    let names: Vec<&str> = list.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let has = |name: &str| names.contains(&name);
    if excludes {
        let no_gpu = on_gpu && (has("cuda") || (has("cuda_copy") && has("cuda_ipc")));
        return if has("tcp") { Some(Fault::NoTcp) } else { no_gpu.then_some(Fault::NoGpu) };
    }
    if !has("tcp") && !has(ALL) {
        return Some(Fault::NoTcp);
    }
    if on_gpu && !GPU.iter().any(|name| has(name)) {
        return Some(Fault::NoGpu);
    }
    let others = names.iter().any(|name| !["tcp", "self"].contains(name));
    (!others).then_some(Fault::OnlyTcp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_without_tcp_or_with_nothing_else_are_named() {
        for (value, want) in [
            ("tcp", Some(Fault::OnlyTcp)),
            ("tcp,self", Some(Fault::OnlyTcp)),
            ("rc,sm", Some(Fault::NoTcp)),
            ("^tcp,cma", Some(Fault::NoTcp)),
            ("^cma", None),
            ("all", None),
            ("sm, tcp", None),
        ] {
            assert_eq!(fault(value, false), want, "{value}");
        }
        assert_eq!((fault("rc,tcp", true), fault("rc,cuda,tcp", true)), (Some(Fault::NoGpu), None));
        assert_eq!((fault("^cuda", true), fault("all", true)), (Some(Fault::NoGpu), None));
    }

    #[test]
    fn engine_config_may_hold_it() {
        assert_eq!(of_engine_config("TLS=rc,tcp").as_deref(), Some("rc,tcp"));
        assert_eq!(of_engine_config("NET_DEVICES=mlx5_0:1"), None);
        assert_eq!(of_engine_config("XTLS=rc"), None);
    }
}
