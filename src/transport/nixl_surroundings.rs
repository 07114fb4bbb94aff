//! What this process is to NIXL: variables that it has read when it was loaded, and the copies of UCX beside it. Neither can be
//! changed any more; both are said, because what follows from them shows elsewhere and much later.
#![forbid(unsafe_code)]

use crate::config::NixlConfig;
use crate::ffi::ucx::Loaded;

/// Says what of `[kv.nixl.env]` this process was not started with.
pub(super) fn tell_of_environment(config: &NixlConfig) {
    for difference in differences(config, |name| std::env::var(name).ok()) {
        tracing::warn!("{difference}");
    }
}

fn differences(config: &NixlConfig, own: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let differs = |(name, wanted): (&String, &String)| {
        let has = own(name);
        (has.as_ref() != Some(wanted)).then(|| {
            let has = has.map_or_else(|| "not set".to_owned(), |has| format!("\"{has}\""));
            format!(
                "{name} is {has} in this process, and \"{wanted}\" in kv.nixl.env: NIXL reads it when a process starts; start \
                 this worker by `pdlink up`, or with {name}={wanted} in its environment"
            )
        })
    };
    config.env.iter().filter_map(differs).collect()
}

/// Says which copies of UCX there are, if there are several.
pub(super) fn tell_of_copies() {
    let copies = Loaded::here().copies;
    if copies.len() > 1 {
        let copies: Vec<_> = copies.iter().map(|copy| copy.display().to_string()).collect();
        tracing::warn!(
            copies = copies.join(", "),
            "this process has more than one copy of UCX, which take each other's place: transfers may fail or crash; start it \
             without the one that is not NIXL's (another wheel, LD_LIBRARY_PATH, LD_PRELOAD)"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named_with_both_values() {
        let env = [("UCX_TLS", "rc,tcp"), ("UCX_LOG_LEVEL", "warn"), ("NIXL_LOG_LEVEL", "INFO")];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let config = NixlConfig { env, ..NixlConfig::default() };
        let own = |name: &str| match name {
            "UCX_TLS" => Some("tcp".to_owned()),
            "UCX_LOG_LEVEL" => Some("warn".to_owned()),
            _ => None,
        };
        let told = differences(&config, own);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("NIXL_LOG_LEVEL is not set in this process, and \"INFO\""), "{told:?}");
        assert!(told[1].starts_with("UCX_TLS is \"tcp\" in this process, and \"rc,tcp\""), "{told:?}");
    }
}
