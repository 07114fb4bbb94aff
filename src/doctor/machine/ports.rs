//! The ports that the plan wishes for: free, or who has them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;

use super::super::check::Answer;
use super::super::setting::{Setting, Wish};
use crate::bench::process;
use crate::launcher::ports::{HeldPort, resolve};
use crate::topology::ports::PortError;

/// State `LISTEN` in the kernel's table.
const LISTEN: &str = "0A";

pub(super) fn check(setting: &Setting) -> Answer {
    if setting.config().is_none() {
        return Answer::skipped("no configuration that can be used names any");
    }
    if setting.target.is_some() {
        return Answer::skipped("a deployment runs and has them");
    }
    if let Err(error) = &setting.place {
        return Answer::skipped(format!("it is not known which ports are this host's: {error}"));
    }
    let wanted: Vec<(&Wish, u16)> = setting.ports.iter().flat_map(each).collect();
    let hosts: BTreeSet<&str> = wanted.iter().map(|(wish, _)| wish.host.as_str()).collect();
    let resolved = hosts.iter().map(|host| Ok((*host, resolve(host)?))).collect::<Result<BTreeMap<_, _>, PortError>>();
    let addresses = match resolved {
        Ok(addresses) => addresses,
        Err(error) => return Answer::fail(error.to_string(), "see host-names"),
    };
    let mut taken = Vec::new();
    for (wish, port) in &wanted {
        let ip = addresses[wish.host.as_str()];
        match HeldPort::bind(ip, *port) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AddrInUse => taken.push((*wish, *port)),
            Err(error) => {
                let seen = format!("port {port} ({}) cannot be bound on {ip}: {error}", wish.purpose);
                return Answer::fail(seen, format!("set `{}` to a port that this user may bind", wish.key));
            }
        }
    }
    let numbers = |ports: &[(&Wish, u16)]| ports.iter().map(|(_, port)| *port).collect::<Vec<u16>>();
    let hosts = hosts.into_iter().collect::<Vec<_>>().join(", ");
    judge(&taken)
        .unwrap_or_else(|| Answer::ok(format!("{} are free on {hosts}", list(&numbers(&wanted)))))
        .with("taken", numbers(&taken))
}

/// The ports of a wish; none where the system chooses.
fn each(wish: &Wish) -> impl Iterator<Item = (&Wish, u16)> {
    let count = if wish.base == 0 { 0 } else { wish.count };
    (0..count).map(move |offset| (wish, wish.base.saturating_add(offset)))
}

fn judge(taken: &[(&Wish, u16)]) -> Option<Answer> {
    let (first, _) = taken.first()?;
    let in_words =
        |(wish, port): &(&Wish, u16)| format!("{port} ({}) is taken on {}{}", wish.purpose, wish.host, held_by(*port));
    let seen = taken.iter().map(in_words).collect::<Vec<_>>().join("; ");
    let fixed = taken.iter().find(|(wish, _)| !wish.search);
    Some(match fixed {
        Some((wish, _)) => {
            let mend = format!("end what uses it, set `{}` elsewhere, or `pd_disagg.auto_ports = true`", wish.key);
            Answer::fail(seen, mend)
        }
        None => Answer::warn(
            seen,
            format!(
                "`pdlink up` will take later ports; end what uses these or set `{}` elsewhere to have those named",
                first.key
            ),
        ),
    })
}

fn list(ports: &[u16]) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}

/// ` by process 7 (python -m server)`, as far as we may see it.
fn held_by(port: u16) -> String {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .flat_map(|table| listeners(&std::fs::read_to_string(table).unwrap_or_default(), port))
        .collect();
    let holder = process::descendants(0).into_iter().find(|process| has_socket(process.pid, &inodes));
    match holder {
        Some(process) => {
            let command = process.command.join(" ");
            let command: String = command.trim().chars().take(80).collect();
            format!(" by process {} ({command})", process.pid)
        }
        None if inodes.is_empty() => " by a socket that does not listen".to_owned(),
        None => " by a process that cannot be seen from here".to_owned(),
    }
}

/// Inodes of the sockets that listen on `port`, from a table of the kernel.
fn listeners(table: &str, port: u16) -> Vec<String> {
    let of_line = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, own) = fields.get(1)?.rsplit_once(':')?;
        let listens = u16::from_str_radix(own, 16) == Ok(port) && fields.get(3) == Some(&LISTEN);
        listens.then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
    };
    table.lines().skip(1).filter_map(of_line).collect()
}

fn has_socket(pid: i32, inodes: &[String]) -> bool {
    let names: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let files = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).into_iter().flatten().flatten();
    files
        .filter_map(|file| std::fs::read_link(file.path()).ok())
        .any(|link| link.to_str().is_some_and(|link| names.iter().any(|name| name == link)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_with_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let told = held_by(port);
        assert!(told.contains(&format!("process {}", std::process::id())), "{told}");
    }
}
