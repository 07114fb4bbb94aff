//! The proxy's admin door, the launcher's back-off, the log's filter.

use tracing_subscriber::EnvFilter;

use super::Bench;
use crate::config::root::is_loopback;

pub(super) fn judge(bench: &mut Bench<'_>) {
    admin(bench);
    backoff(bench);
    log(bench);
}

fn admin(bench: &mut Bench<'_>) {
    let proxy = &bench.config.proxy;
    if proxy.admin_token.as_deref().is_some_and(|token| token.trim().is_empty()) {
        let message = "is empty: everybody would have that token";
        bench.refuse(&["proxy.admin_token"], message, "write a long random text, or leave the key out");
    }
    let Some(listen) = &proxy.admin_listen else { return };
    let key = "proxy.admin_listen";
    let host = listen.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    let Some((host, _)) = host else {
        let message = format!("must be host:port, and here is {listen:?}");
        return bench.refuse(&[key], message, "write it as in \"127.0.0.1:8001\"");
    };
    if proxy.admin_token.is_none() && !is_loopback(host) {
        let message = format!("is {listen}, but without a token only callers on this host are let in");
        bench.warn(&[key], message, "set proxy.admin_token, or the variable PDLINK_ADMIN_TOKEN");
    }
}

fn backoff(bench: &mut Bench<'_>) {
    let launcher = &bench.config.launcher;
    if launcher.restart_backoff_s > launcher.restart_backoff_max_s {
        bench.refuse(
            &["launcher.restart_backoff_s", "launcher.restart_backoff_max_s"],
            format!(
                "is out of order: the first pause is {} s, but the longest {} s",
                launcher.restart_backoff_s, launcher.restart_backoff_max_s
            ),
            "set launcher.restart_backoff_s to launcher.restart_backoff_max_s at most",
        );
    }
}

fn log(bench: &mut Bench<'_>) {
    let level = &bench.config.telemetry.log_level;
    if let Err(error) = EnvFilter::try_new(level) {
        bench.refuse(
            &["telemetry.log_level"],
            format!("is no filter of log lines: {level:?} ({error})"),
            "write error, warn, info, debug or trace, or a list as in \"info,pdlink::kv=debug\"",
        );
    }
}
