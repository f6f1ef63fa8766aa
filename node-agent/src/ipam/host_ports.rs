//! Which attachment has which ports of the host. A port is an attachment's from Reserve until that is undone; what is
//! being undone has none any more, so that a pod that is made anew gets the port of the one before it.

use weft_shared::protocol::{Attachment, PortMapping, Reserve};

use super::table::{Entry, Phase, Table};

/// Another pod has the port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{asker} asks for port {asked} of the host, and {holder} has {held}")]
pub(super) struct PortTaken {
    asked: PortMapping,
    held: PortMapping,
    asker: String,
    holder: String,
}

impl Table {
    /// Refuses what asks for another attachment's port.
    pub(super) fn free_of_others(&self, request: &Reserve) -> Result<(), PortTaken> {
        for asked in &request.host_ports {
            let holder = self.holders(request, asked).next();
            if let Some((key, entry)) = holder
                && let Some(held) = entry.record.host_ports.iter().find(|held| held.overlaps(asked))
            {
                return Err(PortTaken {
                    asked: *asked,
                    held: *held,
                    asker: named(&request.attachment, request.pod.as_deref()),
                    holder: named(key, entry.record.pod.as_deref()),
                });
            }
        }
        Ok(())
    }

    /// Committed attachments that have such a port, each with the index of its veth: they may be dead.
    pub(super) fn committed_holders(&self, request: &Reserve) -> Vec<(Attachment, u32)> {
        let holders = request.host_ports.iter().flat_map(|asked| self.holders(request, asked));
        let wired =
            |(key, entry): (&Attachment, &Entry)| Some((key.clone(), entry.record.committed?.host_ifindex));
        holders.filter_map(wired).collect()
    }

    fn holders<'a>(
        &'a self,
        request: &'a Reserve,
        asked: &'a PortMapping,
    ) -> impl Iterator<Item = (&'a Attachment, &'a Entry)> {
        self.entries().filter(move |(key, entry)| {
            **key != request.attachment
                && !matches!(entry.phase, Phase::Aborted { .. })
                && entry.record.host_ports.iter().any(|held| held.overlaps(asked))
        })
    }
}

fn named(key: &Attachment, pod: Option<&str>) -> String {
    let pod = pod.map(|pod| format!("pod {pod}, ")).unwrap_or_default();
    format!("{pod}container {}", key.container_id)
}
