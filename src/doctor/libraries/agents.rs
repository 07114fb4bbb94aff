//! NIXL's agents at work: two that start at the same instant, and a peer that dies and comes back.

use anyhow::Context;

use super::super::check::Answer;
use super::super::probe::{Order, Probe};
use super::{Libraries, OPEN};
use crate::transport::Export;

const MEND: &str =
    "the nixl path cannot be relied on here: update NIXL, look at [kv.nixl.env] and UCX_TLS, or take another path";

/// Two agents that come up at once may draw the same name, and then one is reached in the other's place.
pub(super) fn together(libraries: &Libraries) -> Answer {
    say(libraries, "two agents that started at once read each other", |libraries| {
        let (mut one, mut other) = (open(libraries)?, open(libraries)?);
        one.send(&GO)?;
        other.send(&GO)?;
        let (of_one, of_other) = (export(&mut one, "the first")?, export(&mut other, "the second")?);
        reads(&mut one, &of_other).context("the first does not read the second")?;
        reads(&mut other, &of_one).context("the second does not read the first")
    })
}

/// A worker that is started again has the address of the one before, and is another peer.
pub(super) fn restart(libraries: &Libraries) -> Answer {
    say(libraries, "an agent reads a peer, and the one that took its place after it was killed", |libraries| {
        let mut reader = open(libraries)?;
        reader.send(&GO)?;
        export(&mut reader, "the reader")?;
        for turn in ["its peer", "the peer that came back"] {
            let mut peer = open(libraries)?;
            peer.send(&GO)?;
            let export = export(&mut peer, turn)?;
            reads(&mut reader, &export).with_context(|| format!("it does not read {turn}"))?;
            // Dropped here, which kills it with its connection open.
        }
        Ok(())
    })
}

/// The line that an end waits for before it starts its agent.
const GO: &str = "go";

fn say(libraries: &Libraries, well: &str, run: impl Fn(&Libraries) -> anyhow::Result<()>) -> Answer {
    match libraries.nixl() {
        Ok(looked) if looked.found.agent.is_ok() => {}
        _ => return libraries.no_nixl(),
    }
    match run(libraries) {
        Ok(()) => Answer::ok(well),
        Err(error) => Answer::fault(libraries.setting.needs_nixl(), format!("{error:#}"), MEND),
    }
}

/// A process with the library open.
fn open(libraries: &Libraries) -> anyhow::Result<Probe> {
    let mut probe = Probe::start(&Order::NixlEnd(libraries.wish()), &libraries.variables())?;
    probe.answer::<()>(OPEN).context("opening NIXL")?;
    Ok(probe)
}

fn export(probe: &mut Probe, which: &str) -> anyhow::Result<Export> {
    probe.answer(OPEN).with_context(|| format!("starting {which}"))
}

fn reads(reader: &mut Probe, peer: &Export) -> anyhow::Result<()> {
    reader.send(peer)?;
    reader.answer(OPEN)
}
